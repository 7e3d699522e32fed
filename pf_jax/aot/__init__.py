"""Compiling for a machine that is not there: memory plans and machine code without the card.

targets    what the compiler has to know about a card.
compile    compile_for: a function, abstract arguments, a target -> memory, seconds, executable.
tpu        the TPU compiler: how it is found and kept quiet, what it says when it refuses.
ptxas      registers and spills of Pallas kernels, from what the assembler prints.
hlo        collectives of an optimised program.
report     all of it for several programs, with a roofline: JSON and tables.
"""
