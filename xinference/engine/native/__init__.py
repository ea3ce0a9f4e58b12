# SPDX-License-Identifier: Apache-2.0
"""Functions in C for CPUs, compiled where they run, and the modules that call them."""
