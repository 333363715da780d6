defmodule VLLM.Hub do
  @moduledoc """
  The models of the Hugging Face hub, and those of them that are on this machine.

      path = VLLM.Hub.pull!("TheBloke/Mistral-7B-Instruct-v0.2-GGUF")

  An engine downloads what it needs by itself: `VLLM.llm!("org/name")`. Here a model is fetched
  before it is needed, as when an image is built or a machine is set up, looked for, and deleted.

  A model is named as on the hub: `"org/name"`. Of a repository of GGUF files `"org/name:Q8_0"` and
  `"org/name:file.gguf"` name one of them; without that it is Q4_K_M, if there is one. Models are
  kept in the cache that all programs for the hub share (`HF_HOME`), and `HF_TOKEN`, `HF_ENDPOINT` and
  `HF_HUB_OFFLINE` are heeded. guides/hub.md tells more.
  """

  import VLLM.Error, only: [bang!: 1]

  alias VLLM.{Error, Options, Tools}
  alias VLLM.Hub.{Found, Model, Transfer}

  @doc """
  Downloads a model, unless it is here, and returns its path: a folder or a GGUF file that
  `VLLM.llm/2` takes.

  Only the files are fetched that an engine of these options needs: one GGUF file out of twenty,
  safetensors and not the same weights in other formats. There must be room for them on the disk.
  Where the calling process ends, as by `Task.shutdown/2`, the download ends, too. What has come of it
  is kept, and the next pull goes on from there. Processes that pull the same files at the same time
  download them once.

  ## Options

  Those of an engine that have a meaning here (`:revision`, `:subfolder`, `:hf_token`, `:download_dir`,
  `:load_format`, `:allowed_models`, `:python`, `:env`; the others are allowed), and

  #{Options.docs(Options.pull())}

  ## Errors

  `:not_allowed`, `:model_not_found`, `:model_gated`, `:hub_unreachable`, `:timeout`, and more; see
  `VLLM.Error`.

      {:ok, path} = VLLM.Hub.pull("Qwen/Qwen2.5-0.5B-Instruct", notify: {self(), :qwen})
  """
  @spec pull(String.t(), keyword() | map()) :: {:ok, Path.t()} | {:error, Error.t()}
  def pull(model, options \\ []) do
    with {:ok, known, _engine} <- Options.split(options, Options.pull()),
         {:ok, %{path: path}} <-
           Transfer.run(:pull, %{model: model}, known, fn told ->
             with {:ok, %{"path" => path}} <-
                    Tools.follow("pull", model, options, Options.pull(), told),
                  do: {:ok, %{path: path}}
           end),
         do: {:ok, path}
  end

  @doc "Like `pull/2`, but returns the path or raises `VLLM.Error`."
  @spec pull!(String.t(), keyword() | map()) :: Path.t()
  def pull!(model, options \\ []), do: bang!(pull(model, options))

  @doc """
  The models of the hub that are on this machine, those first that were used last.

  #{Options.docs(Options.cached())}

  For example:

      {:ok, models} = VLLM.Hub.list()
  """
  @spec list(keyword() | map()) :: {:ok, [Model.t()]} | {:error, Error.t()}
  def list(options \\ []) do
    with {:ok, models} <- Tools.general("models", %{}, options, Options.cached()),
         do: {:ok, Enum.map(models, &Model.from_wire/1)}
  end

  @doc "Like `list/1`, but returns the models or raises `VLLM.Error`."
  @spec list!(keyword() | map()) :: [Model.t()]
  def list!(options \\ []), do: bang!(list(options))

  @doc """
  Deletes a model from this machine, and returns how many bytes that has freed.

  The files of a running engine are not protected: it has read them, but a restart downloads them
  again.

  #{Options.docs(Options.delete())}

  For example:

      {:ok, _bytes} = VLLM.Hub.delete("Qwen/Qwen2.5-0.5B-Instruct")
  """
  @spec delete(String.t(), keyword() | map()) :: {:ok, non_neg_integer()} | {:error, Error.t()}
  def delete(model, options \\ []) do
    with {:ok, model} <- Options.check(:string, :model, model),
         {:ok, %{"freed" => bytes}} <-
           Tools.general("delete", %{"model" => model}, options, Options.delete()),
         do: {:ok, bytes}
  end

  @doc "Like `delete/2`, but returns the bytes or raises `VLLM.Error`."
  @spec delete!(String.t(), keyword() | map()) :: non_neg_integer()
  def delete!(model, options \\ []), do: bang!(delete(model, options))

  @doc """
  Looks for models on the hub whose names have `query` in them, an empty one for all, as with
  `author:`; those first that are downloaded most.

  #{Options.docs(Options.search())}

  For example:

      {:ok, [%VLLM.Hub.Found{} | _]} = VLLM.Hub.search("qwen2.5 awq", limit: 5)
  """
  @spec search(String.t(), keyword() | map()) :: {:ok, [Found.t()]} | {:error, Error.t()}
  def search(query, options \\ []) do
    with {:ok, query} <- query(query),
         {:ok, found} <- Tools.general("search", %{"query" => query}, options, Options.search()),
         do: {:ok, Enum.map(found, &Found.from_wire/1)}
  end

  defp query(""), do: {:ok, ""}
  defp query(query), do: Options.check(:string, :query, query)

  @doc "Like `search/2`, but returns the models or raises `VLLM.Error`."
  @spec search!(String.t(), keyword() | map()) :: [Found.t()]
  def search!(query, options \\ []), do: bang!(search(query, options))
end
