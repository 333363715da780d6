defmodule VLLM.Server.Hosts do
  @moduledoc false
  # The names by which a server may be called. Where no key is asked for, because only programs of
  # this machine reach it, its browsers do as well: a page whose own name is made to
  # mean this machine (DNS rebinding) may read what it asks for there. But its name
  # is in the request.

  alias VLLM.AllowedModels

  @type t :: :any | :loopback | [AllowedModels.pattern()]

  @doc "The names of a server with these options."
  @spec new(%{atom() => term()}) :: t()
  def new(%{hosts: nil, api_keys: nil, ip: ip}), do: if(loopback?(ip), do: :loopback, else: :any)
  def new(%{hosts: nil}), do: :any
  def new(%{hosts: patterns}), do: patterns

  @doc """
  Whether a request with these headers calls the server by one of them.

      iex> headers = [{"host", "evil.example:8000"}]
      iex> for hosts <- [:any, :loopback, ["evil.*"]], do: VLLM.Server.Hosts.allowed?(hosts, headers)
      [true, false, true]
      iex> VLLM.Server.Hosts.allowed?(:loopback, [{"host", "[::1]:8000"}])
      true
  """
  @spec allowed?(t(), [{String.t(), String.t()}]) :: boolean()
  def allowed?(:any, _headers), do: true

  def allowed?(hosts, headers) do
    Enum.all?(for({"host", host} <- headers, do: named?(without_port(host), hosts)))
  end

  defp named?(host, :loopback) do
    # Its bytes may be no text.
    case host |> :binary.bin_to_list() |> :inet.parse_strict_address() do
      {:ok, ip} -> loopback?(ip)
      {:error, :einval} -> host == "localhost" or String.ends_with?(host, ".localhost")
    end
  end

  defp named?(host, patterns), do: AllowedModels.fits_any?(host, patterns)

  defp without_port(host) do
    [host | _port] = host |> String.downcase(:ascii) |> String.split(~r/:\d*\z/)
    host |> String.trim_leading("[") |> String.trim_trailing("]")
  end

  defp loopback?({127, _, _, _}), do: true
  defp loopback?({0, 0, 0, 0, 0, 0, 0, 1}), do: true
  defp loopback?(_ip), do: false
end
