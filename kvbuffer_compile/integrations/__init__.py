"""Adapters to other libraries. Each module here imports its library only when it is used."""
