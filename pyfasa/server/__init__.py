"""``pyfasa serve``: llama-cpp-python's OpenAI-compatible server with ``pyfasa.Llama`` inside.

Nothing here is imported by ``pyfasa`` itself; the packages it needs are the extra ``server``.
"""
