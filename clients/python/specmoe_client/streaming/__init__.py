"""The parts of `Stream` and `AsyncStream`, from the program's arrays to the wire and back.

program -> routing.py -> session.py, ledger.py, tracks.py -> frames.py -> link.py -> service
service -> link.py -> session.py -> forecasts.py -> program

keeper.py connects (connecting.py) and re-opens; conversation.py holds all of it under one lock.
"""
