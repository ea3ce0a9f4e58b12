# SPDX-License-Identifier: Apache-2.0
"""The routes that speak OpenAI's protocol."""
