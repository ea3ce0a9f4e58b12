# SPDX-License-Identifier: Apache-2.0
"""Text of an answer in, in pieces; reasoning, calls of tools and content out. Pure.

One file for each grammar; `grammars.py` says which model writes which.
"""
