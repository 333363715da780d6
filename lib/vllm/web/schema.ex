defmodule VLLM.Web.Schema do
  @moduledoc false
  # The part of JSON Schema in which requests of the admin API are declared: the
  # description has the schemas as they are, and what comes is checked by them.

  alias VLLM.{Error, Options, Secrets}

  @type t :: %{atom() => term()}

  # Of a value that is not what it should be, so much is shown.
  @shown 100

  @doc """
  The value as its schema has it: an integer that is written as `2.0` is one.

      iex> schema = %{type: "object", required: ["n"], properties: %{n: %{type: "integer", minimum: 1}}}
      iex> VLLM.Web.Schema.check(schema, %{"n" => 2.0})
      {:ok, %{"n" => 2}}
      iex> {:error, error} = VLLM.Web.Schema.check(schema, %{"n" => 0})
      iex> error.message
      "`n` must be at least 1; got 0."
  """
  @spec check(t(), term()) :: {:ok, term()} | {:error, Error.t()}
  def check(schema, value) do
    {:ok, checked(schema, value, [])}
  catch
    {:wrong, error} -> {:error, error}
  end

  defp checked(schema, value, path) do
    types = List.wrap(schema[:type] || [])

    value =
      if value_of?(value, types), do: number(value, types), else: wrong_type(value, types, path)

    if Map.has_key?(schema, :enum) and value not in schema.enum,
      do: wrong(path, "must be one of #{Enum.map_join(schema.enum, ", ", &inspect/1)}", value)

    constrained(schema, value, path)
  end

  defp value_of?(_value, []), do: true
  defp value_of?(value, types), do: Enum.any?(types, &of?(&1, value))

  defp of?("object", value), do: is_map(value)
  defp of?("array", value), do: is_list(value)
  defp of?("string", value), do: is_binary(value)
  defp of?("boolean", value), do: is_boolean(value)
  defp of?("null", value), do: is_nil(value)
  defp of?("number", value), do: is_number(value)
  defp of?("integer", value), do: is_integer(value) or (is_float(value) and trunc(value) == value)

  defp number(value, types) do
    if is_float(value) and "integer" in types and "number" not in types,
      do: trunc(value),
      else: value
  end

  defp constrained(schema, map, path) when is_map(map) do
    known = Map.new(schema[:properties] || %{}, fn {name, of} -> {Atom.to_string(name), of} end)

    for name <- schema[:required] || [], not is_map_key(map, name) do
      wrong(path ++ [name], "is missing")
    end

    Map.new(map, fn {name, value} ->
      case {known, schema[:additionalProperties]} do
        {%{^name => of}, _others} -> {name, checked(of, value, path ++ [name])}
        {_known, false} -> throw({:wrong, Options.unknown(name, Map.keys(known))})
        {_known, of} when is_map(of) -> {name, checked(of, value, path ++ [name])}
        _free -> {name, value}
      end
    end)
  end

  defp constrained(schema, list, path) when is_list(list) do
    count(schema, :Items, length(list), path, "elements")

    if schema[:uniqueItems] && list != Enum.uniq(list),
      do: wrong(path, "must not have the same element twice")

    for {item, index} <- Enum.with_index(list),
        do: checked(schema[:items] || %{}, item, path ++ [index])
  end

  defp constrained(schema, text, path) when is_binary(text) do
    count(schema, :Length, text |> String.codepoints() |> length(), path, "characters")

    with pattern when pattern != nil <- schema[:pattern],
         # A newline at the end is one, too.
         false <- Regex.match?(Regex.compile!(pattern, [:unicode, :dollar_endonly]), text),
         do: wrong(path, "must fit the pattern #{pattern}", text)

    text
  end

  defp constrained(schema, number, path) when is_number(number) do
    if number < (schema[:minimum] || number),
      do: wrong(path, "must be at least #{schema.minimum}", number)

    if number > (schema[:maximum] || number),
      do: wrong(path, "must be at most #{schema.maximum}", number)

    number
  end

  defp constrained(_schema, value, _path), do: value

  @least %{Items: :minItems, Length: :minLength}
  @most %{Items: :maxItems, Length: :maxLength}

  defp count(schema, of, count, path, what) do
    least = schema[@least[of]]
    most = schema[@most[of]]
    if least && count < least, do: wrong(path, "must have at least #{least} #{what}")
    if most && count > most, do: wrong(path, "must have at most #{most} #{what}")
  end

  @spec wrong_type(term(), [String.t()], [String.t() | non_neg_integer()]) :: no_return()
  defp wrong_type(value, types, path),
    do: wrong(path, "must be of the type #{Enum.join(types, " or ")}", value)

  @spec wrong([String.t() | non_neg_integer()], String.t(), term()) :: no_return()
  defp wrong(path, how, value) do
    shown =
      if Secrets.name?(List.last(path)),
        do: "something else",
        else: value |> Secrets.inspect() |> String.slice(0, @shown)

    wrong(path, "#{how}; got #{shown}")
  end

  @spec wrong([String.t() | non_neg_integer()], String.t()) :: no_return()
  defp wrong(path, how) do
    name = name(path)
    subject = if name == "", do: "The body", else: "`#{name}`"
    throw({:wrong, Error.new(:invalid_option, "#{subject} #{how}.", %{"option" => name})})
  end

  defp name(path) do
    path
    |> Enum.map_join(fn
      index when is_integer(index) -> "[#{index}]"
      name -> "." <> name
    end)
    |> String.trim_leading(".")
  end
end
