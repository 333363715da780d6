defmodule VLLM.Server.Head do
  @moduledoc false
  # The head of an HTTP/1 request: its first line and its headers, taken apart
  # strictly. What two programs in a row could read differently (a proxy that
  # stands before, and this one) is refused.

  alias VLLM.OpenAI.Refusal

  @enforce_keys [:method, :path, :query, :headers, :version, :length]
  defstruct @enforce_keys

  @typedoc "`length` is what is known of the body's: how many bytes, or that it comes in chunks."
  @type t :: %__MODULE__{
          method: String.t(),
          path: String.t(),
          query: String.t(),
          headers: [{String.t(), binary()}],
          version: 0 | 1,
          length: non_neg_integer() | :chunked
        }

  # A head may have so many bytes, and so many headers.
  @max_bytes 32_768
  @max_headers 128

  @doc ~S"""
  The head that `read` begins with, and what comes after it.

      iex> {:ok, head, "rest"} = VLLM.Server.Head.parse("GET /a?b HTTP/1.1\r\nHost: c\r\n\r\nrest")
      iex> {head.method, head.path, head.query, head.headers, head.length}
      {"GET", "/a", "b", [{"host", "c"}], 0}
      iex> VLLM.Server.Head.parse("GET /a HTTP/1.1\r\n")
      :more
      iex> {:error, refusal} = VLLM.Server.Head.parse("GET /a HTTP/1.1\r\nHost : c\r\n\r\n")
      iex> refusal.status
      400
  """
  @spec parse(binary()) :: {:ok, t(), binary()} | :more | {:error, Refusal.t()}
  # An empty line before a request is left over from the last one's body.
  def parse("\r\n" <> read), do: parse(read)

  def parse(read) do
    case :binary.split(read, "\r\n\r\n") do
      [head, rest] when byte_size(head) <= @max_bytes ->
        with {:ok, head} <- head(:binary.split(head, "\r\n", [:global])), do: {:ok, head, rest}

      [_incomplete] when byte_size(read) <= @max_bytes ->
        :more

      _too_long ->
        {:error, Refusal.head_too_large(@max_bytes)}
    end
  end

  defp head([first | lines]) when length(lines) <= @max_headers do
    with [method, target, "HTTP/1." <> version] <- :binary.split(first, " ", [:global]),
         {:version, version} when version in ["0", "1"] <- {:version, version},
         true <- token?(method),
         {:ok, path, query} <- target(target),
         {:ok, headers} <- headers(lines, []),
         version = String.to_integer(version),
         :ok <- host(headers, version),
         {:ok, length} <- body_length(headers, version) do
      {:ok,
       %__MODULE__{
         method: method,
         path: path,
         query: query,
         headers: headers,
         version: version,
         length: length
       }}
    else
      {:error, refusal} -> {:error, refusal}
      {:version, _other} -> {:error, Refusal.malformed("Its version of HTTP is not 1.1 or 1.0.")}
      _other -> {:error, Refusal.malformed("Its first line is none of HTTP/1.1.")}
    end
  end

  defp head(_lines), do: {:error, Refusal.head_too_large(@max_bytes)}

  # As a proxy is asked, a server is asked with its name before the path.
  defp target("/" <> _ = target) do
    if target =~ ~r/[\x00-\x20\x7f]/ do
      :error
    else
      case :binary.split(target, "?") do
        [path, query] -> {:ok, path, query}
        [path] -> {:ok, path, ""}
      end
    end
  end

  defp target(target) do
    case Regex.run(~r/\Ahttps?:\/\/[^\/?#]+(.*)\z/is, target) do
      [_target, "/" <> _ = path] -> target(path)
      _none -> :error
    end
  end

  defp headers([], headers), do: {:ok, Enum.reverse(headers)}

  defp headers([line | lines], headers) do
    with [name, value] <- :binary.split(line, ":"),
         true <- token?(name) and not (value =~ ~r/[\x00-\x08\x0a-\x1f\x7f]/) do
      headers(lines, [{String.downcase(name, :ascii), trim(value)} | headers])
    else
      # A line that goes on with the last one's value has no name.
      _other -> {:error, Refusal.malformed("One of its headers is none.")}
    end
  end

  # Its bytes may be no text.
  defp trim(value), do: Regex.replace(~r/\A[ \t]+|[ \t]+\z/, value, "")

  defp token?(text), do: text =~ ~r/\A[!#$%&'*+\-.^_`|~0-9A-Za-z]+\z/

  defp host(headers, version) do
    case {values(headers, "host"), version} do
      {[_one], _version} -> :ok
      {[], 0} -> :ok
      _other -> {:error, Refusal.malformed("It needs one `Host`.")}
    end
  end

  defp body_length(headers, version) do
    case {values(headers, "content-length"), values(headers, "transfer-encoding")} do
      {[], []} -> {:ok, 0}
      {[length], []} -> number(length)
      {[], [encoding]} when version == 1 -> encoding(String.downcase(encoding, :ascii))
      _both_or_more -> {:error, Refusal.malformed("The length of its body is not clear.")}
    end
  end

  defp number(text) do
    # More digits than any length has.
    if text =~ ~r/\A[0-9]{1,15}\z/,
      do: {:ok, String.to_integer(text)},
      else: {:error, Refusal.malformed("Its `Content-Length` is no number.")}
  end

  defp encoding("chunked"), do: {:ok, :chunked}

  defp encoding(_other),
    do:
      {:error, Refusal.malformed("A body comes as it is, or with `Transfer-Encoding: chunked`.")}

  defp values(headers, name), do: for({^name, value} <- headers, do: value)

  @doc "Whether a header has this word among its values."
  @spec says?(t(), String.t(), String.t()) :: boolean()
  def says?(head, name, word) do
    Enum.any?(values(head.headers, name), fn value ->
      value |> String.downcase(:ascii) |> String.split([",", " ", "\t"]) |> Enum.member?(word)
    end)
  end
end
