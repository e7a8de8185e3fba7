"""Adapters to other libraries. Each module here imports its library only when it is used.

functions/: functions of other libraries that hide a recurrence. transformers/: speculative decoding for its models.
"""
