"""What is said of tensors that are written and not served: what stood in the way, and what to write instead.

{}: another input of the graph, as algebra.refusals mentions it.
"""

from __future__ import annotations

EMPTY = "the state has an axis of size 0: it holds nothing that could be buffered"
VECTOR = (
    "it is added to element by element, so what a token adds is as large as itself and there is nothing to buffer; the "
    "compiler reads and writes all of it at every token, as much as one more column of a matrix that it lies beside"
)
CACHE = (
    "values are put in, moved along or taken out, and nothing is decayed or added to: a cache or a shift register, no "
    "recurrence"
)
ELEMENTS = "it is changed element by element, and neither decayed nor read by a key: no matrix state"
OVERWRITTEN = "it is overwritten: what is stored does not depend on what was there"
SMALL = "it has fewer than two dims: no matrix state"
COUNTER = "it holds integers: a counter, a mask or indices, no state of a recurrence"
QUANTISED = (
    "the state is stored in integers, so every token rounds all of it: a state that is buffered must be held in "
    "floating point, of 16 bits too"
)
ELSEWHERE = (
    "what another state{} becomes is stored here, as where two tensors take turns: buffered, a state stays in the "
    "tensor that it was read from; store its next value there, and keep no copy"
)
COMPLEX = (
    "the state holds complex numbers: a complex gate is a decay and a rotation of two rows into each other, and a "
    "decay must be one factor a head, a row or a column; keep the state real, and rotate keys and queries by the sum "
    "of the angles so far, as rotary embeddings do"
)
ROTATION = (
    "parts of the state are taken along an axis and put together again, as when rows are rotated into each other in "
    "pairs: a decay must be one factor a head, a row or a column; rotate keys and queries by the sum of the angles so "
    "far instead, as rotary embeddings do"
)
ADDED = (
    "values are added to rows of the state by an index: write it as the product of a key that is zero in the other "
    "rows and a value, or as a sum of at most 16 such products"
)
INDEXED = (
    "rows of the state are taken or stored by an index: they can be followed where they are taken once, whole, by a "
    "one-dimensional integer index, and stored once by the same one"
)
TRANSITION = (
    "every token multiplies the state by a whole matrix, which mixes its rows, its columns or its heads: a matrix that "
    "is a diagonal (or the identity) and a few products k q^T is served if it is written as that sum; for any other no "
    "few rows can stand for what is owed, and there is nothing to be done"
)
