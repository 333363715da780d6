defmodule VLLM.Secrets do
  @moduledoc false
  # What may be secret among what users give: by the names of its keys, at any
  # depth, for errors and crash reports, which must not tell it.

  # `hf_token`, `apiKey`, `AWS_SECRET_ACCESS_KEY`, `Authorization`, …, and the
  # environment of a worker. Not `max_tokens`, `tokenizer` or `prompt_token_ids`.
  @secret ~r/token$|secret|passw|passphrase|credential|authorization|bearer|cookie|(api|access|private|auth|signing|encryption)[_.-]?keys?$|^(auth|pwd|pass|env)$|[_.-](auth|pwd|pass)$/i

  @hidden "[redacted]"

  @doc """
  Whether a value under this name may be a secret.

      iex> Enum.filter(["hf_token", "max_tokens", :apiKey, {1, 2}], &VLLM.Secrets.name?/1)
      ["hf_token", :apiKey]
  """
  @spec name?(term()) :: boolean()
  def name?(name) when is_atom(name), do: name |> Atom.to_string() |> name?()
  def name?(name) when is_binary(name), do: name =~ @secret
  def name?(_other), do: false

  @doc "Whether a term holds something that may be a secret, under a name of its own or further down."
  @spec any?(term()) :: boolean()
  def any?(term), do: hide(term) != term

  @doc """
  Shows a term for an error, in short and without secrets.

      iex> VLLM.Secrets.inspect([{"hf_token", "hf_abc"}, {"extra", %{api_key: "k", depth: 2}}])
      ~s([{"hf_token", "[redacted]"}, {"extra", %{api_key: "[redacted]", depth: 2}}])
  """
  @spec inspect(term()) :: String.t()
  def inspect(term), do: Kernel.inspect(hide(term), limit: 20, printable_limit: 200)

  defp hide({name, value}), do: {hide(name), if(name?(name), do: @hidden, else: hide(value))}
  defp hide(%module{} = struct), do: %{__struct__: module} |> Map.merge(fields(struct))
  defp hide(map) when is_map(map), do: Map.new(map, &hide/1)
  defp hide([head | tail]), do: [hide(head) | hide(tail)]
  defp hide(tuple) when is_tuple(tuple), do: tuple |> Tuple.to_list() |> hide() |> List.to_tuple()
  defp hide(term), do: term

  defp fields(struct), do: struct |> Map.from_struct() |> hide()
end
