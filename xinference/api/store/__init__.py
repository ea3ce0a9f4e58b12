# SPDX-License-Identifier: Apache-2.0
"""What callers asked to keep: answers, files and batches, in one SQLite file for all gateways."""
