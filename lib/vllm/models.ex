defmodule VLLM.Models do
  @moduledoc """
  The models of this machine by their names: what jobs made, folders and files that were registered,
  what was quantized in place (`isq`), and what was downloaded from the hub.

      {:ok, job} = VLLM.Job.quantize("org/llama", name: "llama", to: [gguf: ["Q4_K_M", "Q8_0"]])
      {:ok, _outputs} = VLLM.Job.await(job)
      llm = VLLM.llm!("llama:Q4_K_M")

      VLLM.Models.register!("/models/mistral-awq", "mistral")
      VLLM.Models.alias!("llama:Q4_K_M", "prod")
      {VLLM, name: MyApp.LLM, model: "prod"}

  ## Names

  A name works wherever a model is named: in `VLLM.llm/2` and child specs, `VLLM.Quantization`,
  `VLLM.Job`; that of an adapter as `lora_request:`.

    * `"name"` - a model that has one output, or the one without a label
    * `"name:label"` - one of several outputs: `"llama:Q4_K_M"`
    * an alias, for any of these and for names of the hub

  A folder or file of that name comes first, then the names here, then the hub. Names are kept below
  the folder that `config :ex_vllm, data_dir:` names, and outlive the BEAM. `mix vllm.models` shows
  them, and guides/models.md tells more.

  Where `config :ex_vllm, allowed_models:` says which models may be named, only those are listed, and
  the others are `:not_allowed`.
  """

  import VLLM.Error, only: [bang!: 1]

  alias VLLM.Engine.Table
  alias VLLM.{AllowedModels, Error, Options, Tools}
  alias VLLM.Hub.Transfer
  alias VLLM.Models.Model

  @doc """
  Everything that can be served on this machine, those first that were used last. A worker in Python
  looks for it, which can fail: `:python_not_found`, `:timeout`, `:cache_not_writable` for folders that
  cannot be read.

  #{Options.docs(Options.cached())}

  For example:

      {:ok, models} = VLLM.Models.list()
      for model <- models, model.kind == :model, do: {model.name, model.size}
  """
  @spec list(keyword() | map()) :: {:ok, [Model.t()]} | {:error, Error.t()}
  def list(options \\ []) do
    with {:ok, models} <- Tools.general("registered", %{}, options, Options.cached()) do
      models
      |> Enum.map(&Model.from_wire/1)
      |> Enum.reduce_while({:ok, []}, fn model, {:ok, listed} ->
        case allowed(model) do
          :ok -> {:cont, {:ok, [model | listed]}}
          {:error, %Error{reason: :not_allowed}} -> {:cont, {:ok, listed}}
          {:error, error} -> {:halt, {:error, error}}
        end
      end)
      |> then(&with {:ok, listed} <- &1, do: {:ok, Enum.reverse(listed)})
    end
  end

  # A model may be named by one of its names and not by another.
  defp allowed(model) do
    checks = for name <- [model.name | model.aliases], do: AllowedModels.check(name, nil)
    Enum.find(checks, hd(checks), &(&1 == :ok))
  end

  @doc "Like `list/1`, but returns the models or raises `VLLM.Error`."
  @spec list!(keyword() | map()) :: [Model.t()]
  def list!(options \\ []), do: bang!(list(options))

  @doc """
  The model of a name or an alias. There being none is `:model_not_found`, with the nearest name.

  #{Options.docs(Options.cached())}

  For example:

      {:ok, model} = VLLM.Models.get("llama:Q4_K_M")
      model.quality["perplexity"]
  """
  @spec get(String.t(), keyword() | map()) :: {:ok, Model.t()} | {:error, Error.t()}
  def get(name, options \\ []) do
    with {:ok, name} <- named(name),
         {:ok, [model]} <-
           Tools.general("registered", %{"name" => name}, options, Options.cached()),
         do: {:ok, Model.from_wire(model)}
  end

  @doc "Like `get/2`, but returns the model or raises `VLLM.Error`."
  @spec get!(String.t(), keyword() | map()) :: Model.t()
  def get!(name, options \\ []), do: bang!(get(name, options))

  @doc """
  Gives a name to a model or an adapter that is here: to a folder with files as Hugging Face has
  them, or to a GGUF file. Its files stay where they are.

  The headers of its files are looked at, and what is no model is refused. A name that another model
  has is refused, too (`:name_taken`), unless `replace: true` is given.

  #{Options.docs(Options.register())}

  For example:

      {:ok, model} = VLLM.Models.register("/models/mistral-awq", "mistral")
      {:ok, _model} = VLLM.Models.register("/adapters/sql", "sql")
      VLLM.generate!(llm, "How many users are there?", lora_request: "sql")
  """
  @spec register(Path.t(), String.t(), keyword() | map()) ::
          {:ok, Model.t()} | {:error, Error.t()}
  def register(path, name, options \\ []) do
    with {:ok, path} <- Options.check(:string, :path, path),
         {:ok, name} <- Options.check(:string, :name, name),
         path = Path.expand(path),
         :ok <- AllowedModels.check(path, nil),
         params = %{"path" => path, "name" => name},
         {:ok, model} <- Tools.general("register", params, options, Options.register()),
         do: {:ok, Model.from_wire(model)}
  end

  @doc "Like `register/3`, but returns the model or raises `VLLM.Error`."
  @spec register!(Path.t(), String.t(), keyword() | map()) :: Model.t()
  def register!(path, name, options \\ []), do: bang!(register(path, name, options))

  @doc """
  Gives a model another name, by which an application may call it whatever it is today.

  `model` is a name here, or one of the hub, which need not have been downloaded. An engine that runs
  goes on with what the alias was when it started; `VLLM.reload/3` has it look again.

  #{Options.docs(Options.alias())}

  For example:

      :ok = VLLM.Models.alias("llama:Q4_K_M", "prod")
      :ok = VLLM.Models.alias("llama:Q8_0", "prod", replace: true)
  """
  @spec alias(String.t(), String.t(), keyword() | map()) :: :ok | {:error, Error.t()}
  def alias(model, name, options \\ []) do
    with {:ok, model} <- named(model),
         {:ok, name} <- Options.check(:string, :name, name),
         params = %{"model" => model, "name" => name},
         {:ok, nil} <- Tools.general("alias", params, options, Options.alias()),
         do: :ok
  end

  @doc "Like `alias/3`, but raises `VLLM.Error`."
  @spec alias!(String.t(), String.t(), keyword() | map()) :: :ok
  def alias!(model, name, options \\ []), do: bang!(alias(model, name, options))

  @doc """
  Deletes a model, and returns how many bytes that has freed.

    * What a job made, what was quantized in place (`isq`) or downloaded is gone with its files.
    * Of a folder or file that was registered only the name goes; its files are yours.
    * Of an alias nothing else goes.

  The aliases of a model go with it. One that an engine of this BEAM serves is refused (`:in_use`)
  unless `force: true` is given: an engine has read its files, but a restart of a worker would need
  them. An adapter may be deleted at any time; requests that name it are refused from then on.

  #{Options.docs(Options.unregister())}

  For example:

      {:ok, _bytes} = VLLM.Models.delete("llama:Q8_0")
  """
  @spec delete(String.t(), keyword() | map()) :: {:ok, non_neg_integer()} | {:error, Error.t()}
  def delete(name, options \\ []) do
    with {:ok, name} <- named(name),
         {:ok, %{force: force?}, options} <- Options.split(options, Options.force()),
         params = %{"name" => name, "in_use" => Table.models(), "force" => force?},
         {:ok, %{"freed" => bytes}} <-
           Tools.general("unregister", params, options, Options.cached()),
         do: {:ok, bytes}
  end

  @doc "Like `delete/2`, but returns the bytes or raises `VLLM.Error`."
  @spec delete!(String.t(), keyword() | map()) :: non_neg_integer()
  def delete!(name, options \\ []), do: bang!(delete(name, options))

  @doc """
  Uploads a model or an adapter to the hub, as the repository `"owner/name"`, and returns its address.

  The repository is made where there is none, private unless `private: false` is given. All files go
  up in one commit, so that nobody sees half of them, with a model card (`README.md`) that says what
  the model was made of and how, what it lost, and how to use it; its license is that of its source, as
  far as that has a card. Files that the hub has already are not sent again: a push that was cut off is
  simply repeated. It ends with the calling process.

  #{Options.docs(Options.push())}

  The token is in no log and no error. Without one that may write it is `:hub_unauthorized`.

      {:ok, _url} = VLLM.Models.push("llama:Q4_K_M", "me/llama-Q4_K_M", private: false)
  """
  @spec push(String.t(), String.t(), keyword() | map()) :: {:ok, String.t()} | {:error, Error.t()}
  def push(name, repository, options \\ []) do
    with {:ok, name} <- named(name),
         {:ok, repository} <- Options.check(:string, :repository, repository),
         {:ok, known, _rest} <- Options.split(options, Options.push()),
         params = %{"model" => name, "repository" => repository},
         about = %{model: name, repository: repository},
         {:ok, %{url: url}} <-
           Transfer.run(:push, about, known, fn told ->
             asked = [:private, :hf_token]

             with {:ok, %{"url" => url}} <-
                    Tools.follow_general("push", params, options, Options.push(), asked, told),
                  do: {:ok, %{url: url}}
           end),
         do: {:ok, url}
  end

  @doc "Like `push/3`, but returns the address or raises `VLLM.Error`."
  @spec push!(String.t(), String.t(), keyword() | map()) :: String.t()
  def push!(name, repository, options \\ []), do: bang!(push(name, repository, options))

  defp named(name) do
    with {:ok, name} <- Options.check(:string, :model, name),
         :ok <- AllowedModels.check(name, nil),
         do: {:ok, name}
  end
end
