"""A static model of generated Triton kernels on an H100: what a step would take, and what holds it up. Needs no GPU.

    python -m benchmarks.static_gpu --only gdn --variants buffered --batches 128     one kernel, in words
    python -m benchmarks.static_gpu --table      results/gpu_predicted.json anew; with --variants verify those rows
    python -m benchmarks.static_gpu --pins       what tests/kernels/test_static_gpu.py holds kernels to, anew

A kernel is compiled for sm_90 with the arguments its launcher passes, disassembled, and run on a multiprocessor:

    kernel           compiled ahead of time; what the model needs to know of it
    disassembly      instructions with ptxas' own schedule: cycles to stall, scoreboards waited for and set
    pointers         which tensor a load or store touches: kernel arguments followed through registers
    branches         the `if`s and `for`s of the generated Python around a line
    trace            one warp's way through the kernel in a given step
    traffic          how the bytes that it asks for are met: from memory, from L2, or not at all
    machine          the card: sizes, rates, latencies
    memory           queues of one multiprocessor: load/store unit, port, L2, DRAM
    multiprocessor   warps executed in order by their schedule
    predict          a step in seconds: steady, with a flush, mean over a period
    table, pins      the two files of results
    __main__         the command line

Accuracy. The parameters were fitted by hand to an early version of the kernels (results/gpu_h100.json, Triton 3.6), by
a script that did not wait for asynchronous copies yet, so these are no held-out errors: recurrent steps within 25 % in
18 of 20 rows (median 6 %), buffered ones in 17 of 20 (median 19 %), verify steps in 8 of 20 (median 31 %): for those it
is not calibrated. Two later kernels that were not fitted (buffered GDN and KDA, float32, batch 128) were measured at
124 and 134 us and predicted at 104 and 115: decode that memory binds comes out 15 to 20 % too fast. Not modelled: bank
conflicts, hits in L1, throttling, pages of DRAM, changing clocks. Steps that read a shadow of their state cannot be
told: ptxas puts the loads of both branches at lines behind them, and the model takes both.

Good for: comparing variants of one kernel; telling memory, issue slots and latency apart as what binds; finding spills,
loads made twice and repeated work. Not for: differences below 20 %, tenths of a microsecond at batch 1, verify steps in
absolute terms, choosing a flush length for users, or any claim of what a GPU does.
"""
