# SPDX-License-Identifier: Apache-2.0
"""Embeddings in OpenAI's form, and reranking in Cohere's and Jina's."""
