"""Streams that follow other programs' models by themselves, each in a module that needs that program.

from specmoe_client.integrations.transformers import attach
"""
