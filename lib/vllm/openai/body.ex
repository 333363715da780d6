defmodule VLLM.OpenAI.Body do
  @moduledoc false
  # The members of a JSON object that one has to know, without reading the rest:
  # a body may have images in it, and vLLM reads it as a whole.

  alias VLLM.JSON

  @doc ~S"""
  The members of the JSON object `body` that have these names, as they are written there. Of several of
  a name the last counts, as it does in Python.

      iex> VLLM.OpenAI.Body.members(~s({"model": "m", "prompt": ["a", {"b": "}"}], "n": 1}), ~w(model prompt))
      {:ok, %{"model" => ~s("m"), "prompt" => ~s(["a", {"b": "}"}])}}
      iex> VLLM.OpenAI.Body.members("[1]", ~w(model))
      :error
  """
  @spec members(binary(), [String.t()]) :: {:ok, %{String.t() => binary()}} | :error
  def members(body, names) do
    case skip(body) do
      "{" <> rest -> rest |> skip() |> member(names, %{})
      _other -> :error
    end
  catch
    :malformed -> :error
  end

  @doc ~S"""
  The text of a JSON string.

      iex> VLLM.OpenAI.Body.text(~S("org\/m\u00e9"))
      {:ok, "org/mé"}
      iex> VLLM.OpenAI.Body.text("1")
      :error
  """
  @spec text(binary()) :: {:ok, String.t()} | :error
  def text(written) do
    with {:ok, text} <- JSON.decode(written),
         do: if(is_binary(text), do: {:ok, text}, else: :error)
  end

  defp member("}" <> _rest, _names, found), do: {:ok, found}

  defp member("\"" <> _ = body, names, found) do
    {key, rest} = value(body)

    with {:ok, name} <- text(key),
         ":" <> rest <- skip(rest) do
      {value, rest} = rest |> skip() |> value()
      found = if name in names, do: Map.put(found, name, value), else: found

      case skip(rest) do
        "," <> rest -> rest |> skip() |> member(names, found)
        "}" <> _rest -> {:ok, found}
        _other -> :error
      end
    else
      _other -> :error
    end
  end

  defp member(_body, _names, _found), do: :error

  # A value as it is written, and what follows.
  defp value(body) do
    size = size(body, 0, 0)
    if size == 0, do: throw(:malformed)
    <<value::binary-size(size), rest::binary>> = body
    {value, rest}
  end

  defp size(<<?", rest::binary>>, at, depth) do
    length = string(rest, 0)
    at = at + 1 + length
    if depth == 0, do: at, else: size(drop(rest, length), at, depth)
  end

  defp size(<<open, rest::binary>>, at, depth) when open in ~c"{[",
    do: size(rest, at + 1, depth + 1)

  # Of a number, or a word.
  defp size(<<close, _::binary>>, at, 0) when close in ~c"]}, \t\r\n", do: at
  defp size(<<close, _::binary>>, at, 1) when close in ~c"]}", do: at + 1

  defp size(<<close, rest::binary>>, at, depth) when close in ~c"]}",
    do: size(rest, at + 1, depth - 1)

  defp size(<<_other, rest::binary>>, at, depth), do: size(rest, at + 1, depth)
  defp size(<<>>, _at, _depth), do: throw(:malformed)

  # The bytes until a string ends, its quote among them.
  defp string(<<?", _::binary>>, at), do: at + 1
  defp string(<<?\\, _, rest::binary>>, at), do: string(rest, at + 2)
  defp string(<<_other, rest::binary>>, at), do: string(rest, at + 1)
  defp string(<<>>, _at), do: throw(:malformed)

  defp drop(binary, size), do: binary_part(binary, size, byte_size(binary) - size)

  defp skip(<<space, rest::binary>>) when space in ~c" \t\r\n", do: skip(rest)
  defp skip(rest), do: rest
end
