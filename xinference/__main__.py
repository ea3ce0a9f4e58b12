# SPDX-License-Identifier: Apache-2.0
"""`python -m xinference` is the `xinference` command."""

from xinference.cli.main import main

main()
