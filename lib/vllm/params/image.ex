defmodule VLLM.Image do
  @moduledoc false
  # The images of a prompt, for the wire: files and binaries as bin, URLs as str.

  alias VLLM.Bridge.MessagePack
  alias VLLM.{Params, Secrets}

  @type t :: VLLM.image()

  @doc "What `multi_modal_data` says, for the wire; files are read here."
  @spec to_wire(term()) :: {:ok, map()} | {:error, String.t()}
  def to_wire(%{image: images} = data) when map_size(data) == 1, do: images(images)
  def to_wire(%{"image" => images} = data) when map_size(data) == 1, do: images(images)

  def to_wire(data) when is_map(data) and not is_struct(data),
    do: {:error, "`multi_modal_data` has one key, `image`."}

  def to_wire(_other), do: {:error, "`multi_modal_data` is a map with the key `image`."}

  defp images([]), do: {:error, "`multi_modal_data` has no image; it needs at least one."}

  defp images(images) do
    images = if is_list(images) and not List.improper?(images), do: images, else: [images]

    case Params.each(images, &one/1) do
      {:ok, images} -> {:ok, %{"image" => images}}
      {:error, message, _index} -> {:error, message}
    end
  end

  defp one({:binary, data}) when is_binary(data), do: {:ok, MessagePack.bin(data)}

  defp one({:file, path} = image) when is_binary(path) do
    case File.read(path) do
      {:ok, data} ->
        {:ok, MessagePack.bin(data)}

      {:error, reason} ->
        {:error, "The image #{inspect(image)} cannot be read: #{:file.format_error(reason)}."}
    end
  end

  defp one({:url, url} = image) when is_binary(url) do
    if String.valid?(url),
      do: {:ok, url},
      else: {:error, "The URL of the image #{inspect(image)} is not valid UTF-8 text."}
  end

  defp one(other) do
    {:error,
     "An image is `{:file, path}`, `{:binary, bytes}` or `{:url, url}`; got " <>
       "#{Secrets.inspect(other)}."}
  end
end
