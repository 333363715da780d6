defmodule VLLM.Wire do
  @moduledoc false
  # What users give as values for vLLM, in the terms that the wire has: maps with
  # strings (or integers) as keys, lists, strings, numbers, booleans and nil.
  # Users may also write atoms for strings and, at any depth, keyword lists for
  # maps. All that goes to a worker and is not made by this library passes
  # through here, once. Of structs, those pass whose module has this behaviour.

  alias VLLM.Bridge.MessagePack

  @doc "What a struct of the module stands for; the term may hold other such structs."
  @callback __wire__(struct()) :: term()

  @typedoc "The keys and indexes that lead to a value."
  @type path :: [String.t() | integer()]

  @typedoc "Why a term cannot be sent, as what follows `it is`, or `it holds` where the path is not empty."
  @type fault :: {String.t(), path()}

  # MessagePack lets lists and maps be nested 512 deep; the frame has some of them.
  @max_depth 500

  # Of a longer path, a message shows so much.
  @shown 20

  # MessagePack has floats for these.
  @numbers [:nan, :infinity, :neg_infinity]

  @doc """
  The term as the wire has it. Never shows a value in an error: it may be a secret.

      iex> VLLM.Wire.encode(%{pass_config: [fuse: true, level: :O2]})
      {:ok, %{"pass_config" => %{"fuse" => true, "level" => "O2"}}}

      iex> VLLM.Wire.encode(%{sizes: [1, {2, 3}]})
      {:error, {"a tuple", ["sizes", 1]}}
  """
  @spec encode(term()) :: {:ok, term()} | {:error, fault()}
  def encode(term) do
    {:ok, convert(term, [])}
  catch
    {:fault, what, path} -> {:error, {what, Enum.reverse(path)}}
  end

  @doc """
  What is wrong, in words, as what follows the name of the value.

      iex> VLLM.Wire.describe({"a tuple", ["pass_config", 0, "fuse"]})
      "cannot be sent: it holds a tuple at `pass_config[0].fuse`"
  """
  @spec describe(fault()) :: String.t()
  def describe({what, []}), do: "cannot be sent: it is #{what}"

  def describe({what, path}) do
    {shown, rest} = Enum.split(path, @shown)

    at =
      Enum.map_join(shown, fn
        index when is_integer(index) -> "[#{index}]"
        key -> ".#{key}"
      end)

    more = if rest == [], do: "", else: "…"
    "cannot be sent: it holds #{what} at `#{String.trim_leading(at, ".")}#{more}`"
  end

  defp convert(atom, _path) when atom in [nil, true, false] or atom in @numbers, do: atom
  defp convert(atom, _path) when is_atom(atom), do: Atom.to_string(atom)
  defp convert(float, _path) when is_float(float), do: float

  defp convert(integer, _path)
       when is_integer(integer) and integer >= -0x8000_0000_0000_0000 and
              integer <= 0xFFFF_FFFF_FFFF_FFFF,
       do: integer

  defp convert(string, path) when is_binary(string) do
    if MessagePack.text?(string),
      do: string,
      else: fault("a string that is not valid UTF-8", path)
  end

  defp convert(term, path) when length(path) > @max_depth,
    do: fault("#{kind(term)}, nested more than #{@max_depth} deep,", path)

  defp convert([{name, _} | _] = list, path) when is_atom(name) do
    if Keyword.keyword?(list),
      # The first of several counts, as in `Keyword.get/2`.
      do: list |> Enum.reverse() |> Map.new() |> convert(path),
      else: elements(list, path, 0)
  end

  defp convert(list, path) when is_list(list), do: elements(list, path, 0)

  defp convert(%module{} = struct, path) do
    if Code.ensure_loaded?(module) and function_exported?(module, :__wire__, 1),
      do: struct |> module.__wire__() |> convert(path),
      else: fault(kind(struct), path)
  end

  defp convert(map, path) when is_map(map) do
    converted =
      for {name, value} <- map, into: %{} do
        key = key(name, path)
        {key, convert(value, [key | path])}
      end

    if map_size(converted) < map_size(map),
      do: fault("a name that is given twice, as an atom and as a string,", [twice(map) | path]),
      else: converted
  end

  defp convert(term, path), do: fault(kind(term), path)

  defp elements([element | rest], path, index),
    do: [convert(element, [index | path]) | elements(rest, path, index + 1)]

  defp elements([], _path, _index), do: []
  defp elements(_tail, path, _index), do: fault("an improper list", path)

  defp key(name, _path) when is_atom(name), do: Atom.to_string(name)
  defp key(name, _path) when is_integer(name), do: name

  defp key(name, path) when is_binary(name) do
    if MessagePack.text?(name), do: name, else: fault("a key that is not valid UTF-8", path)
  end

  defp key(name, path), do: fault("#{kind(name)} as a key", path)

  defp twice(map) do
    map
    |> Map.keys()
    |> Enum.find(&(is_atom(&1) and is_map_key(map, Atom.to_string(&1))))
    |> Atom.to_string()
  end

  defp kind(%module{}), do: "a struct (`#{inspect(module)}`)"
  defp kind(term) when is_tuple(term), do: "a tuple"
  defp kind(term) when is_function(term), do: "a function"
  defp kind(term) when is_integer(term), do: "an integer of more than 64 bits"
  defp kind(term) when is_list(term), do: "a list"
  defp kind(term) when is_map(term), do: "a map"
  defp kind(term) when is_float(term), do: "a float"
  defp kind(term) when is_bitstring(term), do: "a bitstring"
  defp kind(_term), do: "a pid, a port or a reference"

  @spec fault(String.t(), path()) :: no_return()
  defp fault(what, path), do: throw({:fault, what, path})
end
