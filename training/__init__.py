# SPDX-License-Identifier: Apache-2.0
"""How the embedded model is made: its text, its training, its examination. Not installed."""
