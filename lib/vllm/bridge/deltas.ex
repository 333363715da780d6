defmodule VLLM.Bridge.Deltas do
  @moduledoc false
  # Hands what a step of the engine adds to its streams on to who reads them, as the owner of the
  # port gets it: in rows, or in columns. A reader gets each delta of its own by itself; a relay (see
  # `t:VLLM.Bridge.Connection.relay/0`) gets those of all its streams in one message.

  alias VLLM.Bridge.{Connection, Inbox}

  @typedoc "Something with the routes of a connection."
  @type routed :: %{:routes => :ets.table(), optional(atom()) => term()}

  @typedoc """
  Where the deltas of a step go, by its column of ids: from one step to the next the streams are mostly
  the same. What was found once may be used on, since an address that is closed takes nothing, and
  no id is used twice.
  """
  @type steps :: %{binary() => targets()}

  # All to readers, all to one relay with these numbers, or some of each.
  @typep targets ::
           [Inbox.address() | nil]
           | {:relay, pid(), numbers :: binary()}
           | {:mixed, [Inbox.address() | Connection.relay() | nil]}

  # More than vLLM parts the outputs of one step in.
  @max_steps 8

  ## In rows

  @doc """
  Hands on deltas that came in rows: each as `{:delta, row}`; to a relay `{:rows, [[number | row], …]}`.
  """
  @spec rows(routed(), [term()]) :: :ok | {:malformed, String.t()}
  def rows(conn, rows), do: rows(rows, conn.routes, %{})

  defp rows([], _routes, relayed) do
    for {relay, rows} <- relayed, do: send(relay, {:rows, Enum.reverse(rows)})
    :ok
  end

  defp rows([[id | [index, text, token_ids, logprobs, _, _ | _] = row] | rest], routes, relayed)
       when is_integer(index) and is_binary(text) and rem(byte_size(token_ids), 4) == 0 and
              (is_map(logprobs) or logprobs == nil),
       do: row(id, row, rest, routes, relayed)

  # Of an answer over HTTP: the head, or a piece of its body.
  defp rows([[id, status, headers] | rest], routes, relayed)
       when is_integer(status) and is_list(headers),
       do: row(id, [status, headers], rest, routes, relayed)

  defp rows([[id, piece] | rest], routes, relayed) when is_binary(piece),
    do: row(id, [:binary.copy(piece)], rest, routes, relayed)

  defp rows(_misshapen, _routes, _relayed), do: misshapen()

  defp row(id, row, rest, routes, relayed) do
    case target(routes, id) do
      nil ->
        rows(rest, routes, relayed)

      :once ->
        no_stream()

      {:relay, relay, number} ->
        row = [number | row]
        rows(rest, routes, Map.update(relayed, relay, [row], &[row | &1]))

      address ->
        Inbox.send(address, {:delta, row})
        rows(rest, routes, relayed)
    end
  end

  ## In columns

  @doc """
  Hands on deltas that came in columns: each as `{:delta, text, token_ids}`, with the ids as they
  came, or of one token, as most are, in a list. They are no more than that, and of the first
  completion. To a relay `{:columns, numbers, counts, token_ids, texts}`, for `deal/4`.
  """
  @spec columns(routed(), map(), steps()) :: {:ok, steps()} | {:malformed, String.t()}
  def columns(
        conn,
        %{"ids" => ids, "counts" => counts, "token_ids" => bytes} = params,
        steps
      )
      when is_binary(ids) and rem(byte_size(ids), 8) == 0 and is_binary(counts) and
             is_binary(bytes) do
    with {:ok, targets, steps} <- targets(conn.routes, ids, steps),
         :ok <- hand_on(targets, counts, bytes, params["texts"]),
         do: {:ok, steps}
  end

  def columns(_conn, _params, _steps), do: misshapen()

  defp targets(routes, ids, steps) do
    case steps do
      %{^ids => targets} ->
        {:ok, targets, steps}

      _new ->
        targets = for <<id::64-little <- ids>>, do: target(routes, id)

        if :once in targets do
          no_stream()
        else
          targets = sort(targets)
          {:ok, targets, note(steps, ids, targets)}
        end
    end
  end

  @doc "Notes what was found of the column `ids`, and forgets earlier ones where these are many."
  @spec note(%{binary() => found}, binary(), found) :: %{binary() => found} when found: term()
  def note(steps, ids, found) do
    steps = if map_size(steps) < @max_steps, do: steps, else: %{}
    Map.put(steps, :binary.copy(ids), found)
  end

  defp sort(targets) do
    case for({:relay, relay, _number} <- targets, uniq: true, do: relay) do
      [] ->
        targets

      [relay] ->
        numbers = for {:relay, _relay, number} <- targets, into: <<>>, do: <<number::64-little>>

        if byte_size(numbers) == 8 * length(targets),
          do: {:relay, relay, numbers},
          else: {:mixed, targets}

      _several ->
        {:mixed, targets}
    end
  end

  defp hand_on({:relay, relay, numbers}, counts, bytes, texts) do
    if 2 * byte_size(counts) == byte_size(numbers) and fit?(counts, byte_size(bytes), texts) do
      send(relay, {:columns, numbers, counts, bytes, texts})
      :ok
    else
      misshapen()
    end
  end

  defp hand_on({:mixed, targets}, counts, bytes, texts),
    do: share(targets, counts, bytes, texts, %{})

  defp hand_on(addresses, counts, bytes, texts), do: deal(addresses, counts, bytes, texts)

  defp fit?(<<count::32-little, counts::binary>>, bytes, [text | texts])
       when is_binary(text) and 4 * count <= bytes,
       do: fit?(counts, bytes - 4 * count, texts)

  defp fit?(counts, bytes, texts), do: counts == <<>> and bytes == 0 and texts == []

  @doc "Sends each address what the columns have for it."
  @spec deal([Inbox.address() | nil], binary(), binary(), term()) ::
          :ok | {:malformed, String.t()}
  # Copies, which cost no more than references do: one delta that is kept keeps no others.
  def deal(
        [address | addresses],
        <<1::32-little, counts::binary>>,
        <<token_id::32-little, bytes::binary>>,
        [text | texts]
      )
      when is_binary(text) do
    if address, do: Inbox.send(address, {:delta, :binary.copy(text), [token_id]})
    deal(addresses, counts, bytes, texts)
  end

  def deal(
        [address | addresses],
        <<count::32-little, counts::binary>>,
        bytes,
        [text | texts]
      )
      when is_binary(text) and count * 4 <= byte_size(bytes) do
    size = count * 4
    <<token_ids::binary-size(size), bytes::binary>> = bytes
    if address, do: Inbox.send(address, {:delta, :binary.copy(text), :binary.copy(token_ids)})
    deal(addresses, counts, bytes, texts)
  end

  def deal([], <<>>, <<>>, []), do: :ok
  def deal(_addresses, _counts, _bytes, _texts), do: misshapen()

  # As `deal/4`, with columns for each of the relays.
  defp share(
         [target | targets],
         <<count::32-little, counts::binary>>,
         bytes,
         [text | texts],
         shares
       )
       when is_binary(text) and count * 4 <= byte_size(bytes) do
    size = count * 4
    <<token_ids::binary-size(size), bytes::binary>> = bytes

    case target do
      {:relay, relay, number} ->
        one = {<<number::64-little>>, <<count::32-little>>, token_ids, text}
        share(targets, counts, bytes, texts, Map.update(shares, relay, [one], &[one | &1]))

      address ->
        :ok = deal([address], <<count::32-little>>, token_ids, [text])
        share(targets, counts, bytes, texts, shares)
    end
  end

  defp share([], <<>>, <<>>, [], shares) do
    for {relay, share} <- shares do
      share = Enum.reverse(share)
      [numbers, counts, token_ids] = for n <- 0..2, do: join(share, n)
      send(relay, {:columns, numbers, counts, token_ids, for({_, _, _, text} <- share, do: text)})
    end

    :ok
  end

  defp share(_targets, _counts, _bytes, _texts, _shares), do: misshapen()

  defp join(share, n), do: IO.iodata_to_binary(for one <- share, do: elem(one, n))

  defp target(routes, id) do
    case :ets.lookup(routes, id) do
      [{_id, address, _pid, _monitor, :many, _counts_as}] -> address
      [{_id, _address, _pid, _monitor, {:relay, _, _} = relay, _counts_as}] -> relay
      [_once] -> :once
      [] -> nil
    end
  end

  # Its caller would take the delta for the answer.
  defp no_stream, do: {:malformed, "a delta of a request that is no stream"}
  defp misshapen, do: {:malformed, "a delta of another shape"}
end
