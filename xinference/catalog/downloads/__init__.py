# SPDX-License-Identifier: Apache-2.0
"""From a hub into a directory of this host: which files, whole ones only, and what is kept.

`selection` and `cache` decide and remember, `hubs` and `transfer` talk; the process that a worker
starts for a download is `python -m xinference.catalog.downloads`. Nothing here runs by being
imported.
"""
