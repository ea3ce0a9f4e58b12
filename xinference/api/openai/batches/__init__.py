# SPDX-License-Identifier: Apache-2.0
"""OpenAI's batches: files of requests that are answered when there is time."""
