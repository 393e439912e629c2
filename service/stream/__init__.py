"""The stream: one WebSocket connection that takes routing as it happens and gives forecasts back.

wire (WebSocket) -> Connection (messages, sequences) -> Hub (batches of all connections) -> wire
"""
