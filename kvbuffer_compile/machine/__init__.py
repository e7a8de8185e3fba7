"""What the cost model knows about a device.

Goes in: a device. Comes out: a `Machine` (numbers.py), measured once (measure.py) and kept on disk (stored.py).
Start with numbers.py. Imports nothing of the compiler; generated kernels are timed by steps/timing.py.
"""

from kvbuffer_compile.machine.numbers import Machine, Speed
from kvbuffer_compile.machine.stored import identity, keep, load, machine_for, measured_again

__all__ = ["Machine", "Speed", "identity", "keep", "load", "machine_for", "measured_again"]
