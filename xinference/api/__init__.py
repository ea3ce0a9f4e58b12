# SPDX-License-Identifier: Apache-2.0
"""HTTP to protocol values and back. The only home of FastAPI."""
