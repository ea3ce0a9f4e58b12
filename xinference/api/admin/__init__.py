# SPDX-License-Identifier: Apache-2.0
"""Xinference's own routes: the life of models, the catalogue, the cluster."""
