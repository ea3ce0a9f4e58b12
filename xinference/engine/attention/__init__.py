# SPDX-License-Identifier: Apache-2.0
"""Attention over paged keys and values: one interface, one reference, one backend per device.

`interface.py` is what transformers calls and what a backend must do; `reference.py` is plain
PyTorch on any device and defines what is right; `cpu.py` is the fast one on CPU. Layout of a
block in memory is a backend's own affair.
"""
