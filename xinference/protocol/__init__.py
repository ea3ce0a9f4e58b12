# SPDX-License-Identifier: Apache-2.0
"""The values that cross a process boundary: frozen dataclasses of the standard library.

They know nothing of HTTP, actors, frames or tensors; `api` turns HTTP into them, `cluster`
carries them, `models` and `engine` act on them.
"""
