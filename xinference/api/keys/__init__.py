# SPDX-License-Identifier: Apache-2.0
"""API keys: what they are, where they are kept, what each may do, and what was used with it.

`key` and `rate` are pure; `store` is the SQLite file that every gateway process of a host shares;
`keyring` keeps a process's copy of it fresh and admits callers; `caller` is a cluster as one
caller may use it. None of it knows HTTP.
"""
