# SPDX-License-Identifier: Apache-2.0
"""Words on a terminal to one client call, or to one running server.

Results go to stdout; progress, prompts and warnings to stderr. Exit codes: 0 done, 1 failed with
one line that says why, 2 the words are wrong, 130 interrupted. Imports of httpx, rich, uvicorn and
of the cluster are deferred to the commands that need them, so that `--help` costs nothing.
"""
