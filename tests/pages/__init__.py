# SPDX-License-Identifier: Apache-2.0
"""The pages of `doc/` as data: their examples, and the reference that is written from the code."""
