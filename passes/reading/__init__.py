"""FX nodes read as a closed set of forms, with a label for what each dim runs over.

Goes in: a functionalised ATen graph. Comes out: forms, labels, along which indices a value really varies.
Start with aten.py, the table of ops, then forms.py. Never imports any other folder of passes.
"""
