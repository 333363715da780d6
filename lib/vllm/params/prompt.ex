defmodule VLLM.Prompt do
  @moduledoc false
  # Prompts as users give them, for the wire.

  alias VLLM.Bridge.MessagePack
  alias VLLM.{Error, Image, Params, Secrets}

  @type t :: VLLM.prompt()

  @doc """
  One prompt or a list of prompts as a list for the wire.

  A list of integers is refused with a hint: it could be meant as one prompt or
  as a mistake.
  """
  @spec to_wire(t() | [t()]) :: {:ok, [term()]} | {:error, Error.t()}
  def to_wire(prompts) when is_list(prompts) and prompts != [] do
    if List.improper?(prompts) do
      {:error,
       Error.new(:invalid_prompt, "Prompts are given as a list, and this is not a proper one.")}
    else
      with {:error, message, index} <- Params.each(prompts, &one/1),
           do: {:error, invalid(message, index)}
    end
  end

  def to_wire([]), do: {:ok, []}

  def to_wire(prompt) do
    case one(prompt) do
      {:ok, prompt} -> {:ok, [prompt]}
      {:error, message} -> {:error, invalid(message, 0)}
    end
  end

  defp invalid(message, index),
    do: Error.new(:invalid_prompt, message, %{"prompt_index" => index})

  defp one(""), do: {:error, "A prompt is empty; it needs at least one token."}

  defp one(prompt) when is_binary(prompt) do
    if String.valid?(prompt),
      do: {:ok, prompt},
      else: {:error, "A prompt is not valid UTF-8 text."}
  end

  defp one(%{multi_modal_data: data} = prompt),
    do: with_images(Map.delete(prompt, :multi_modal_data), data)

  defp one(%{"multi_modal_data" => data} = prompt),
    do: with_images(Map.delete(prompt, "multi_modal_data"), data)

  defp one(%{prompt_token_ids: ids}), do: token_ids(ids)
  defp one(%{"prompt_token_ids" => ids}), do: token_ids(ids)
  defp one(%{prompt_embeds: data, shape: shape}), do: embeds(data, shape)
  defp one(%{"prompt_embeds" => data, "shape" => shape}), do: embeds(data, shape)

  defp one(integer) when is_integer(integer) do
    {:error, "A prompt of token ids is given as `%{prompt_token_ids: [1, 2, 3]}`."}
  end

  defp one(other) do
    {:error,
     "A prompt is a string, `%{prompt_token_ids: [1, 2, 3]}` or " <>
       "`%{prompt_embeds: binary, shape: {tokens, hidden_size}}`; got #{Secrets.inspect(other)}."}
  end

  defp with_images(prompt, data) do
    with {:ok, prompt} <- text_or_tokens(prompt),
         {:ok, data} <- Image.to_wire(data),
         do: {:ok, Map.put(prompt, "multi_modal_data", data)}
  end

  defp text_or_tokens(%{prompt_token_ids: ids}), do: token_ids(ids)
  defp text_or_tokens(%{"prompt_token_ids" => ids}), do: token_ids(ids)
  defp text_or_tokens(%{prompt: text}) when is_binary(text), do: text(text)
  defp text_or_tokens(%{"prompt" => text}) when is_binary(text), do: text(text)

  defp text_or_tokens(_other) do
    {:error,
     "A prompt with images is `%{prompt: text, multi_modal_data: %{image: images}}`, or has " <>
       "`prompt_token_ids` in place of `prompt`."}
  end

  defp text(text), do: with({:ok, text} <- one(text), do: {:ok, %{"prompt" => text}})

  defp token_ids(ids) do
    case pack(ids) do
      {:ok, <<>>} -> {:error, "A prompt has no token ids; it needs at least one."}
      {:ok, bytes} -> {:ok, %{"prompt_token_ids" => MessagePack.bin(bytes)}}
      {:error, message} -> {:error, "`prompt_token_ids` " <> message}
    end
  end

  defp embeds(data, {tokens, hidden_size} = shape)
       when is_binary(data) and is_integer(tokens) and tokens > 0 and is_integer(hidden_size) do
    if byte_size(data) == 4 * tokens * hidden_size do
      {:ok, %{"prompt_embeds" => MessagePack.bin(data), "shape" => [tokens, hidden_size]}}
    else
      {:error,
       "`prompt_embeds` has #{byte_size(data)} bytes; 32-bit floats of the shape #{inspect(shape)} " <>
         "have #{4 * tokens * hidden_size}."}
    end
  end

  defp embeds(_data, shape) do
    {:error,
     "A prompt of embeddings is given as `%{prompt_embeds: binary, shape: {tokens, hidden_size}}`, " <>
       "of one token at least; got the shape #{Secrets.inspect(shape)}."}
  end

  @doc "Token ids as the wire has them: little-endian u32."
  @spec pack_token_ids(term()) :: {:ok, binary()} | {:error, Error.t()}
  def pack_token_ids(ids) do
    with {:error, message} <- pack(ids),
         do: {:error, Error.new(:invalid_prompt, "Token ids " <> message)}
  end

  defp pack(ids) when is_list(ids) do
    if not List.improper?(ids) and
         Enum.all?(ids, &(is_integer(&1) and &1 >= 0 and &1 < 0x1_0000_0000)),
       do: {:ok, for(id <- ids, into: <<>>, do: <<id::32-little>>)},
       else: {:error, "are integers of at least 0."}
  end

  defp pack(_), do: {:error, "are a list of integers."}
end
