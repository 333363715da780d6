defmodule VLLM.Fuzz do
  @moduledoc """
  Hostile frames: those of a real session (`frames.txt`, made by `scripts/record_frames.exs`),
  changed at random; and what must hold of each when it comes from a worker.

  Draws from `:rand` of the calling process, so that its seed gives the same frames again.
  """

  alias VLLM.Bridge.{Connection, Deltas, MessagePack, Shape}
  alias VLLM.{Delta, Error, Telemetry}

  @frames Path.expand("frames.txt", __DIR__)

  # Bytes that begin something, or announce a length.
  @heads [0x80, 0x8F, 0x90, 0x9F, 0xA1, 0xBF, 0xC0, 0xC1, 0xC4, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB] ++
           [0xCF, 0xD3, 0xD4, 0xD6, 0xD7, 0xD8, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF]
  @lengths [0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
  @span %{metadata: %{method: "generate", model: "m", stream?: true}, params: %{}, started_at: 0}
  @wide [0xC6, 0xC9, 0xDB, 0xDD, 0xDF]

  @doc "The frames that workers sent (`:from_worker`) or got (`:to_worker`), as a tuple."
  @spec corpus(:from_worker | :to_worker) :: tuple()
  def corpus(direction) do
    mark = if direction == :from_worker, do: "<", else: ">"

    for line <- File.stream!(@frames), [^mark, hex] <- [String.split(line)] do
      Base.decode16!(hex, case: :lower)
    end
    |> List.to_tuple()
  end

  @doc "A hostile frame."
  @spec frame(tuple()) :: binary()
  def frame(corpus) do
    case :rand.uniform(20) do
      1 -> :rand.bytes(:rand.uniform(64) - 1)
      2 -> <<0x94, 0x01, :rand.bytes(:rand.uniform(64) - 1)::binary>>
      3 -> <<0x93, 0x02, :rand.bytes(:rand.uniform(64) - 1)::binary>>
      n when n <= 11 -> reshape(pick(corpus), corpus)
      _ -> change(pick(corpus), :rand.uniform(4), corpus)
    end
  end

  # A message with a value in the place of another: well-formed, and wrong.
  defp reshape(frame, corpus) do
    {:ok, message} = MessagePack.decode(frame)
    {:ok, other} = MessagePack.decode(pick(corpus))

    message
    |> replace(any_value(other))
    |> text_or_bytes()
    |> MessagePack.encode!()
    |> IO.iodata_to_binary()
  end

  defp replace(term, value) do
    cond do
      :rand.uniform(10) == 1 ->
        value

      is_list(term) and term != [] ->
        # Mostly what comes last, which in a message is all but its head.
        last = Enum.max(for _ <- 1..4, do: :rand.uniform(length(term)) - 1)
        List.update_at(term, last, &replace(&1, value))

      is_map(term) and term != %{} and not is_struct(term) ->
        key = term |> Map.keys() |> Enum.random()
        Map.update!(term, key, &replace(&1, value))

      true ->
        value
    end
  end

  defp any_value(other) do
    case :rand.uniform(3) do
      1 -> Enum.random([[], %{}, [nil], [[]], [%{}], %{"" => nil}, %{1 => 2}, [1, "a", nil]])
      2 -> Enum.random([nil, true, 0, -1, 2 ** 63, 0.5, :nan, "", "x", "reason", <<0::64>>])
      3 -> descend(other)
    end
  end

  defp descend([_ | _] = list) do
    if :rand.uniform(3) > 1, do: descend(Enum.random(list)), else: list
  end

  defp descend(map) when is_map(map) and map_size(map) > 0 and not is_struct(map),
    do: descend(map |> Map.values() |> Enum.random())

  defp descend(value), do: value

  # Decoding does not tell the two apart.
  defp text_or_bytes(term) when is_binary(term) do
    if String.valid?(term), do: term, else: MessagePack.bin(term)
  end

  defp text_or_bytes(term) when is_list(term), do: Enum.map(term, &text_or_bytes/1)

  defp text_or_bytes(term) when is_map(term) and not is_struct(term) do
    Map.new(term, fn {key, value} -> {text_or_bytes(key), text_or_bytes(value)} end)
  end

  defp text_or_bytes(term), do: term

  defp change(frame, 0, _corpus), do: frame
  defp change(<<>>, _times, _corpus), do: <<>>

  defp change(frame, times, corpus) do
    size = byte_size(frame)
    at = :rand.uniform(size) - 1
    <<before::binary-size(at), byte, rest::binary>> = frame

    changed =
      case :rand.uniform(10) do
        1 -> [before, Bitwise.bxor(byte, Bitwise.bsl(1, :rand.uniform(8) - 1)), rest]
        2 -> [before, :rand.uniform(256) - 1, rest]
        3 -> [before, pick_head(), rest]
        # A part less, the end less, a part twice, a part of another frame.
        4 -> [before, part(rest, :rand.uniform(8))]
        5 -> before
        6 -> [before, byte, binary_part(rest, 0, min(byte_size(rest), :rand.uniform(64))), rest]
        7 -> [before, part(pick(corpus), :rand.uniform(size))]
        # A length that nothing stands behind, and one that something does.
        8 -> [before, Enum.random(@wide), <<Enum.random(@lengths)::32>>, rest]
        9 -> [before, pick_head(), <<:rand.uniform(16) - 1>>, rest]
        10 -> [before, :binary.copy(nesting(), Enum.random([1, 30, 511, 512, 600])), byte, rest]
      end

    change(IO.iodata_to_binary(changed), times - 1, corpus)
  end

  defp nesting, do: Enum.random([<<0x91>>, <<0x81>>, <<0x81, 0xA1, ?k>>, <<0xDC, 1::16>>])
  defp part(binary, skipped), do: binary_slice(binary, skipped..-1//1)
  defp pick_head, do: Enum.random(@heads)
  defp pick(corpus), do: elem(corpus, :rand.uniform(tuple_size(corpus)) - 1)

  @doc """
  Reads a frame as the owner of a port and a caller do, and says whether it is a message. Raises
  where it is neither a message nor malformed.
  """
  @spec read(binary()) :: :accepted | :rejected
  def read(frame) do
    case Connection.parse(frame) do
      {:response, id, body} when is_integer(id) and id >= 0 ->
        case Connection.decode_response(body) do
          {:ok, result} ->
            read_result(result)
            :accepted

          {:error, %Error{reason: reason, message: message}}
          when is_atom(reason) and is_binary(message) ->
            :accepted

          {:error, {:malformed, reason}} when is_binary(reason) ->
            :rejected
        end

      {:notification, method, params} when is_binary(method) and is_map(params) ->
        for [_id | row] <- List.wrap(params["deltas"]),
            Shape.delta?(row),
            do: Delta.from_wire(row)

        if is_map_key(params, "ids"), do: read_packed(params)
        :accepted

      {:malformed, reason} when is_binary(reason) ->
        :rejected
    end
  end

  # Nobody waits for any of them.
  defp read_packed(params) do
    routes = :ets.new(:routes, [])

    case Deltas.columns(%{routes: routes}, params, %{}) do
      {:ok, %{}} -> :ok
      {:malformed, reason} when is_binary(reason) -> :ok
    end

    :ets.delete(routes)
  end

  # What passes for an answer is read without a crash.
  @readers %{
    "generate" => &VLLM.RequestOutput.from_wire/1,
    "beam_search" => &VLLM.BeamSearchOutput.from_wire/1,
    "pool" => &VLLM.PoolingOutput.from_wire/1
  }

  defp read_result(result) do
    for {method, read} <- @readers, Shape.answer?(method, result) do
      Telemetry.request_end(@span, {:ok, result})
      read.(result)
    end

    if Shape.answer?("load", result), do: VLLM.EngineInfo.from_wire(result)

    if Shape.answer?("score", result) do
      for output <- result, do: VLLM.Score.from_wire(output, 0)
    end
  end
end
