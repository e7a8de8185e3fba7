"""Compiler passes: captured graph -> Program -> Plan -> rewritten graph."""
