"""Compiling for a machine that is not there: memory plans and machine code without the GPU.

targets    what the compiler has to know about a card.
compile    compile_for: a function, abstract arguments, a target -> memory, seconds, executable.
"""
