defmodule VLLM.OpenAI.Models do
  @moduledoc false
  # The names that clients may give, and which engine or adapter each stands for.
  # The engines are asked each time: one may start, be reloaded or get an adapter
  # at any moment.

  alias VLLM.{Error, LoRA, Options, Params, Remote}
  alias VLLM.Engine.{Call, Table}

  @typedoc "An engine that is served: under a name of its own, or nil for those that it has."
  @type entry :: %{name: String.t() | nil, engine: VLLM.engine(), settings: map()}

  @entry [
    {:engine, :term, nil, "the engine"},
    {:name, :string, nil, "its name for clients"},
    {:tool_call_parser, :string, nil, "vLLM's name of a parser of tool calls"},
    {:chat_template, :string, nil, "a template instead of the model's"}
  ]

  @doc "What is given as `models:`, checked."
  @spec entries(term()) :: {:ok, [entry(), ...]} | {:error, Error.t()}
  def entries([_ | _] = given), do: Params.map(given, &entry/1)

  def entries(_other) do
    {:error,
     Error.new(
       :invalid_option,
       "`models` must be a list of engines to serve: `models: [MyApp.LLM]`.",
       %{"option" => "models"}
     )}
  end

  defp entry({name, engine}) when is_binary(name), do: entry(name: name, engine: engine)

  defp entry([{_, _} | _] = options) do
    with {:ok, options} <- Options.only(options, @entry) do
      settings =
        for name <- [:tool_call_parser, :chat_template], value = options[name], into: %{} do
          {Atom.to_string(name), value}
        end

      {:ok, %{name: options.name, engine: options.engine, settings: settings}}
    end
  end

  defp entry(engine), do: {:ok, %{name: nil, engine: engine, settings: %{}}}

  # Where engines are named that were started over HTTP, by names that no atom is made of.
  @names VLLM.Web.Names

  @doc "What an engine is named that is started over HTTP."
  @spec name(String.t()) :: GenServer.name()
  def name(text), do: {:via, Registry, {@names, text}}

  @doc "The engines that were started so."
  @spec started() :: [entry()]
  def started do
    for {{:via, Registry, {@names, name}}, _table} <- Enum.sort(Table.engines()),
        do: started(name)
  end

  @doc "The one of this name."
  @spec started(String.t()) :: entry()
  def started(name), do: %{name: name, engine: name(name), settings: %{}}

  @doc "Has the workers of these engines make vLLM's API app ready when they start, before anybody asks."
  @spec announce([entry()]) :: :ok
  def announce(entries) do
    for entry <- entries,
        {:ok, table, _pid} <- [Table.lookup(entry.engine)],
        do: Table.put_http(table, entry.settings)

    :ok
  end

  @doc """
  Has those of them that run already make it ready, and waits until they were told, which may be for as long
  as the engine starts. What is wrong is told to whoever asks.
  """
  @spec prepare(entry()) :: :ok
  def prepare(entry) do
    params = %{"settings" => entry.settings}
    call = Call.new(%{timeout: :infinity})
    _told = Remote.run(entry.engine, {:each, "prepare_http", params}, call)
    :ok
  end

  @doc "What clients call the engine with this table, as far as it is served."
  @spec names_of([entry()], Table.t()) :: [String.t()]
  def names_of(entries, table) do
    for entry <- entries,
        {:ok, ^table, _pid} <- [Table.lookup(entry.engine)],
        name <- names(entry),
        do: name
  end

  # How long a list of all names waits for the adapters of an engine, in ms.
  @patience 5_000

  @doc "All names there are now, each with what OpenAI's API tells of a model."
  @spec all([entry()], timeout()) :: [{String.t(), map()}]
  def all(entries, timeout) do
    adapters = entries |> loras(min(timeout, @patience)) |> Map.new()

    Enum.flat_map(entries, fn entry ->
      case adapters do
        %{^entry => {:ok, loras}} -> own(entry) ++ adapters(entry, loras)
        _none_or_not_now -> own(entry)
      end
    end)
  end

  @doc "The names of the engines themselves, without those of adapters: nobody is asked."
  @spec engines([entry()]) :: [String.t()]
  def engines(entries), do: Enum.flat_map(entries, &names/1)

  defp own(entry) do
    for name <- names(entry), do: {name, about(name, entry, nil)}
  end

  defp adapters(entry, loras) do
    parent = entry |> names() |> List.first()
    for lora <- loras, do: {lora.lora_name, about(lora.lora_name, entry, parent)}
  end

  defp about(name, entry, parent) do
    %{
      id: name,
      object: "model",
      created: 0,
      owned_by: "vllm",
      # vLLM has the folder here, which is none of a client's business.
      root: name,
      parent: parent,
      max_model_len: info(entry)["max_model_len"]
    }
  end

  @doc """
  What `name` stands for: an engine, or one with an adapter that it has loaded. Nil for none. The error
  is that of an engine whose adapters cannot be known, where no other has the name.
  """
  @spec find([entry()], String.t(), timeout()) ::
          {:ok, entry(), VLLM.LoRARequest.t() | nil} | {:error, Error.t()} | nil
  def find(entries, name, timeout) do
    case Enum.find(entries, &(name in names(&1))) do
      nil -> entries |> loras(timeout) |> Enum.reduce_while(nil, &adapter(&1, &2, name))
      entry -> {:ok, entry, nil}
    end
  end

  defp adapter({entry, {:ok, loras}}, found, name) do
    case Enum.find(loras, &(&1.lora_name == name)) do
      nil -> {:cont, found}
      lora -> {:halt, {:ok, entry, lora}}
    end
  end

  defp adapter({_entry, {:error, error}}, found, _name), do: {:cont, found || {:error, error}}

  # Those that each engine's workers have, as the engines answer: one that starts or hangs keeps
  # nobody from the others'.
  defp loras(entries, timeout) do
    with_adapters = Enum.filter(entries, &(engine_options(&1)["enable_lora"] == true))

    with_adapters
    |> Task.async_stream(&{&1, LoRA.list(&1.engine, timeout: timeout)},
      max_concurrency: max(1, length(with_adapters)),
      ordered: false,
      timeout: :infinity
    )
    |> Stream.map(fn {:ok, answer} -> answer end)
  end

  @doc "Which runner of vLLM's the engine has, or nil while that is not known."
  @spec runner(entry()) :: String.t() | nil
  def runner(entry), do: info(entry)["runner"]

  defp names(%{name: name}) when name != nil, do: [name]

  defp names(entry) do
    case engine_options(entry)["served_model_name"] do
      nil -> entry |> config(& &1.model) |> List.wrap()
      names -> List.wrap(names)
    end
  end

  defp engine_options(entry), do: config(entry, & &1.engine_options) || %{}

  defp config(entry, take), do: read(entry, nil, &take.(Table.config(&1)))

  defp info(entry), do: read(entry, %{}, &Table.info/1)

  defp read(entry, unknown, read) do
    case Table.lookup(entry.engine) do
      {:ok, table, _pid} -> read.(table)
      {:error, _not_running} -> unknown
    end
  rescue
    # Not all is known before the first start is over, and nothing after the end.
    ArgumentError -> unknown
  end
end
