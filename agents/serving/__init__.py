"""An edited model behind an OpenAI-compatible server, with a page to edit it in the browser.

``hiedit serve`` starts it; FastAPI and uvicorn come with the extra ``serve``.
"""
