# SPDX-License-Identifier: Apache-2.0
"""The routes that speak Anthropic's protocol."""
