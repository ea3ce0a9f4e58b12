# SPDX-License-Identifier: Apache-2.0
"""Place and route: the processes and actors of a cluster. The only home of xoscar."""
