defmodule VLLM.Params do
  @moduledoc false
  # What the structs of parameters share: a field for each parameter, which is
  # `:default` until it is given; and how lists of what users give are checked.

  alias VLLM.{Error, Options}

  @doc """
  The parameters of `empty` with what a user gave: options, or such a struct,
  which stays as it is.
  """
  @spec new(struct(), struct() | keyword() | map()) :: {:ok, struct()} | {:error, Error.t()}
  def new(%module{}, given) when is_struct(given, module), do: {:ok, given}

  def new(empty, given) do
    with {:ok, given} <- Options.to_map(given), do: put(empty, given, [])
  end

  @doc """
  The parameters with those of `given` put in. `also` are names of the caller's
  that a misspelt one may have meant.
  """
  @spec put(struct(), %{String.t() => term()}, [atom()]) :: {:ok, struct()} | {:error, Error.t()}
  def put(params, given, also) do
    names = params |> Map.from_struct() |> Map.keys()

    Enum.reduce_while(given, {:ok, params}, fn {name, value}, {:ok, params} ->
      case Enum.find(names, &(Atom.to_string(&1) == name)) do
        nil -> {:halt, {:error, Options.unknown(name, names ++ also)}}
        key -> {:cont, {:ok, Map.put(params, key, value)}}
      end
    end)
  end

  @doc "What `check` makes of each element, or its first error with the index of the element."
  @spec each([element], (element -> {:ok, result} | {:error, error})) ::
          {:ok, [result]} | {:error, error, non_neg_integer()}
        when element: term(), result: term(), error: term()
  def each(list, check), do: each(list, check, 0, [])

  defp each([], _check, _index, results), do: {:ok, Enum.reverse(results)}

  defp each([element | rest], check, index, results) do
    case check.(element) do
      {:ok, result} -> each(rest, check, index + 1, [result | results])
      {:error, error} -> {:error, error, index}
    end
  end

  @doc "What was given, in no order."
  @spec given(struct()) :: keyword()
  def given(params) do
    for {name, value} <- Map.from_struct(params), value != :default, do: {name, value}
  end

  @spec to_wire(struct()) :: %{String.t() => term()}
  def to_wire(params) do
    Map.new(given(params), fn {name, value} -> {Atom.to_string(name), value} end)
  end

  @doc "The call that makes these parameters: only what was given."
  @spec inspect(struct(), String.t(), Inspect.Opts.t()) :: Inspect.Algebra.t()
  def inspect(params, constructor, opts) do
    import Inspect.Algebra, only: [concat: 1, to_doc: 2]
    concat(["VLLM.", constructor, "(", to_doc(given(params), opts), ")"])
  end
end
