"""Transports: how rows travel between ranks."""
