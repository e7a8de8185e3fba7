"""What is done to the graph that Dynamo captured before AOTAutograd sees it.

Goes in: a captured graph. Comes out: the graph with its loops written out, or the decision to leave it alone because it
needs gradients.
Start with loops.py. Never imports what runs steps, or the backend.
"""
