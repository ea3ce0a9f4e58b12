# SPDX-License-Identifier: Apache-2.0
"""A loaded model of some kind, ready to answer."""
