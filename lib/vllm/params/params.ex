defmodule VLLM.Params do
  @moduledoc false
  # What the structs of parameters share. Such a struct has a field for each
  # parameter, which is `:default` until it is given:
  #
  #     use VLLM.Params,
  #       parameters: [max_tokens: "tokens to make at most", …],
  #       made_by: "sampling_params!",
  #       elsewhere: %{"regex" => "It is given as …"}
  #
  # `elsewhere` tells of names that are none of these where they belong.

  alias VLLM.{Error, Options}

  @typedoc "A module that uses this one."
  @type kind :: module()

  @callback fields() :: %{String.t() => atom()}
  @callback elsewhere() :: %{String.t() => String.t()}

  defmacro __using__(options) do
    quote do
      @behaviour VLLM.Params
      @behaviour VLLM.Wire
      @options unquote(options)
      @fields for {name, _doc} <- @options[:parameters], into: %{}, do: {to_string(name), name}
      @elsewhere Keyword.get(@options, :elsewhere, %{})

      defstruct for {name, _doc} <- @options[:parameters], do: {name, :default}

      @type t :: %__MODULE__{}

      @doc false
      @impl VLLM.Params
      def fields, do: @fields

      @doc false
      @impl VLLM.Params
      def elsewhere, do: @elsewhere

      @doc false
      @spec new(t() | keyword() | map()) :: {:ok, t()} | {:error, VLLM.Error.t()}
      def new(given), do: VLLM.Params.new(__MODULE__, given)

      @doc false
      @impl VLLM.Wire
      def __wire__(params), do: VLLM.Params.given(params)

      defimpl Inspect do
        def inspect(params, opts),
          do: VLLM.Params.inspect(params, unquote(options[:made_by]), opts)
      end
    end
  end

  @doc "Parameters from options, in wire terms. Made ones stay as they are."
  @spec new(kind(), struct() | keyword() | map()) :: {:ok, struct()} | {:error, Error.t()}
  def new(kind, given) when is_struct(given, kind), do: {:ok, given}

  def new(kind, given) do
    with {:ok, given} <- Options.to_map(given),
         {:ok, given} <- known(kind, given, []) do
      {:ok, struct!(kind, for({name, value} <- given, do: {kind.fields()[name], value}))}
    end
  end

  @doc """
  The parameters of a call, for the wire: those `given` as one of its options, which
  is called `name`, and over them those given inline, of which `also` could be meant
  for the call itself.
  """
  @spec to_wire(kind(), atom(), term(), %{String.t() => term()}, [atom()]) ::
          {:ok, %{String.t() => term()}} | {:error, Error.t()}
  def to_wire(kind, name, given, inline, also) do
    with {:ok, given} <- options(kind, name, given),
         {:ok, given} <- known(kind, given, []),
         {:ok, inline} <- known(kind, inline, also),
         do: {:ok, Map.merge(given, inline)}
  end

  defp options(_kind, _name, nil), do: {:ok, %{}}

  defp options(kind, name, given) do
    if is_struct(given, kind),
      do: {:ok, Map.new(given(given), fn {name, value} -> {Atom.to_string(name), value} end)},
      else: Options.to_map(given, Atom.to_string(name))
  end

  defp known(kind, given, also) do
    fields = kind.fields()

    case Enum.find(Map.keys(given), &(not is_map_key(fields, &1))) do
      nil -> Options.to_wire(given)
      name -> {:error, unknown(kind, name, also)}
    end
  end

  defp unknown(kind, name, also) do
    case kind.elsewhere() do
      %{^name => where} ->
        Error.new(:invalid_option, "Unknown option `#{name}`. #{where}", %{"option" => name})

      _ ->
        Options.unknown(name, Map.keys(kind.fields()) ++ also)
    end
  end

  @doc "What was given, in no order."
  @spec given(struct()) :: keyword()
  def given(params) do
    for {name, value} <- Map.from_struct(params), value != :default, do: {name, value}
  end

  @doc "The call that makes these parameters: only what was given."
  @spec inspect(struct(), String.t(), Inspect.Opts.t()) :: Inspect.Algebra.t()
  def inspect(params, constructor, opts) do
    import Inspect.Algebra, only: [concat: 1, to_doc: 2]
    concat(["VLLM.", constructor, "(", to_doc(given(params), opts), ")"])
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

  @doc "The same where the place of an error says nothing."
  @spec map([element], (element -> {:ok, result} | {:error, error})) ::
          {:ok, [result]} | {:error, error}
        when element: term(), result: term(), error: term()
  def map(list, check) do
    with {:error, error, _index} <- each(list, check), do: {:error, error}
  end
end
