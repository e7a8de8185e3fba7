"""Code generation: Program and Plan -> source text -> callable."""
