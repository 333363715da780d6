"""Models of the Hugging Face hub: which files there are of one, what they say before they are
fetched, and how they come here.

``huggingface_hub`` is the client, and the folder of downloaded models is its own, so that other
programs share it. Nothing here imports torch or vLLM, and nothing asks the hub before it must.

    name = names.parse("org/name:Q8_0")
    repository = look_up(name, options)        one question
    folder = ghost.of(repository, options)     the small files, and headers of the large ones
    path = download.pull(repository, options)  all of them

``options`` are an engine's, of which ``revision``, ``subfolder``, ``hf_token``, ``download_dir``,
``load_format`` and ``config_format`` count here.
"""
