# SPDX-License-Identifier: Apache-2.0
"""Language models on engines that are servers of their own: vLLM, SGLang, llama.cpp, TRT-LLM.

model.py       what the replica holds: prompts become tokens here, text is read here
loop.py        asks the server, aborts by closing connections, counts
process.py     the server as a child; leash.py ends it with us
dialect.py     what each engine has to define; one module for each
tokens.py      the model's tokenizer
"""
