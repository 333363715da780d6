defmodule Mix.Vllm.Arguments do
  @moduledoc false
  # The command line of tasks that ask about a model: the model, and options by
  # the names that they have in Elixir, with `-` for `_`. Which there are is for
  # those to say who take them, vLLM among them.

  alias VLLM.Options

  @doc """
  The model, the options for it, and the task's own flags (the names of switches without a
  value) that were given.

      iex> Mix.Vllm.Arguments.parse!(~w(org/m --max-model-len 8192 --json), "vllm.check", ~w(json))
      {"org/m", %{"max_model_len" => 8192}, ["json"]}
  """
  @spec parse!([String.t()], String.t(), [String.t()]) ::
          {String.t(), %{String.t() => term()}, [String.t()]}
  def parse!(argv, task, flags) do
    case parse_all!(argv, task, flags) do
      {[model], options, flags} ->
        {model, options, flags}

      {[_, word | _], _options, _flags} ->
        Mix.raise("mix #{task} takes one model, and no argument #{inspect(word)}")
    end
  end

  @doc """
  Like `parse!/3`, for tasks that take several models. `switches` are options of the task that stand
  without a value, beside those that engines have.

      iex> Mix.Vllm.Arguments.parse_all!(~w(--merge org/m texts), "vllm.finetune", [], ~w(merge))
      {["org/m", "texts"], %{"merge" => true}, []}
  """
  @spec parse_all!([String.t()], String.t(), [String.t()], [String.t()]) ::
          {[String.t(), ...], %{String.t() => term()}, [String.t()]}
  def parse_all!(argv, task, flags, switches \\ []) do
    switches = flags ++ switches ++ named(:boolean)
    {models, options} = argv |> words(switches) |> Enum.split_with(&is_binary/1)

    if models == [],
      do: Mix.raise("Which model? `mix #{task} MODEL`, with a folder, a file or a hub id.")

    {flags, options} = Enum.split_with(options, fn {name, _value} -> name in flags end)
    {models, Enum.reduce(options, %{}, &put!(&1, &2, task)), for({name, true} <- flags, do: name)}
  end

  @doc """
  Options in the value of one: names and values with `=` between, parted by commas.

      iex> Mix.Vllm.Arguments.pairs!("model=/m/awq,max-num-seqs=16", "against")
      %{"model" => "/m/awq", "max_num_seqs" => 16}
  """
  @spec pairs!(String.t(), String.t()) :: %{String.t() => term()}
  def pairs!(text, option) do
    for pair <- String.split(text, ",", trim: true), into: %{} do
      case String.split(pair, "=", parts: 2) do
        [name, value] -> {underscored(name), value(underscored(name), value)}
        [word] -> Mix.raise("--#{option} takes NAME=VALUE,…; got #{inspect(word)}")
      end
    end
  end

  defp put!({name, _value}, options, task) when is_map_key(options, name),
    do: Mix.raise("mix #{task} takes --#{String.replace(name, "_", "-")} once")

  defp put!({name, value}, options, _task), do: Map.put(options, name, value)

  defp words([], _switches), do: []

  defp words(["--no-" <> name | rest], switches),
    do: [{underscored(name), false} | words(rest, switches)]

  defp words(["--" <> word | rest], switches) do
    [name | value] = String.split(word, "=", parts: 2)
    name = underscored(name)

    case {value, rest} do
      {[value], rest} ->
        [{name, value(name, value)} | words(rest, switches)]

      {[], [value | rest]} when value in ["true", "false"] ->
        [{name, value(value)} | words(rest, switches)]

      {[], ["--" <> _ | _]} ->
        [{name, true} | words(rest, switches)]

      {[], []} ->
        [{name, true}]

      {[], [value | after_value]} ->
        if name in switches,
          do: [{name, true} | words(rest, switches)],
          else: [{name, value(name, value)} | words(after_value, switches)]
    end
  end

  defp words([word | rest], switches), do: [word | words(rest, switches)]

  @doc """
  The value of an option as it is written on a command line, or in the environment.

      iex> for {name, text} <- [{"port", "80"}, {"revision", "80"}, {"hosts", "a, b"}, {"nodes", "a@b"}],
      ...>   do: Mix.Vllm.Arguments.value(name, text)
      [80, "80", ["a", "b"], [:a@b]]
  """
  @spec value(String.t(), String.t()) :: term()
  def value(name, text) do
    cond do
      # A revision may look like a number.
      name in named(:string) -> text
      name in named(:machine) or name in named(:patterns) -> list(text)
      name in named(:distinct_nodes) -> text |> list() |> Enum.map(&String.to_atom/1)
      name in named(:counts) -> counts(value(text))
      true -> value(text)
    end
  end

  @doc "What stands between commas."
  @spec list(String.t()) :: [String.t()]
  def list(text), do: text |> String.split(",", trim: true) |> Enum.map(&String.trim/1)

  # The options whose values are of a type, this library's and vLLM's.
  defp named(type) do
    questions =
      Options.tools() ++
        Options.estimate() ++
        Options.recommend() ++ Options.pull() ++ Options.compare() ++ Options.bench()

    specs =
      questions ++
        Options.server() ++ Options.quantize() ++ Options.finetune() ++ Options.engine()

    ours = for {name, ^type, _default, _doc} <- specs, do: name

    theirs =
      for {name, word, _default, _doc} <- Options.engine_arguments(),
          word == Atom.to_string(type),
          do: name

    Enum.map(ours ++ theirs, &Atom.to_string/1)
  end

  defp counts(text) when is_binary(text), do: text |> String.split(",") |> Enum.map(&value/1)
  defp counts(count), do: count

  defp value("true"), do: true
  defp value("false"), do: false

  defp value(text) do
    case {Integer.parse(text), Float.parse(text)} do
      {{number, ""}, _} -> number
      {_, {number, ""}} -> number
      _ -> text
    end
  end

  defp underscored(name), do: String.replace(name, "-", "_")
end
