defmodule VLLM.Server.Headers do
  @moduledoc false
  # What is done with a request's headers as soon as they are there, in the process
  # of the connection: httpd's `customize`, whose behaviour allows strings only.

  # How long 64 KiB of a body may take, in ms.
  @body_timeout 60_000

  @doc "httpd's callback, for each header."
  @spec request_header({charlist(), charlist()}) :: {true, {charlist(), charlist() | fun()}}
  # httpd has no limit for bodies whose length is not known: this encoding is one that it does not know.
  def request_header({'transfer-encoding', _encoding}),
    do: {true, {'transfer-encoding', 'refused'}}

  def request_header({'content-length', _length} = header) do
    start_body_timer()
    {true, header}
  end

  # httpd logs its state when it crashes, and no log shows what a function has in it.
  def request_header({name, key}) when name in ['authorization', 'x-api-key'],
    do: {true, {name, fn -> key end}}

  def request_header(header), do: {true, header}

  @doc """
  Starts again to wait for a part of the body. When it does not come, httpd gets the message that it sends
  itself for late headers, which it answers with 408; for bodies it sends itself none.
  """
  @spec start_body_timer() :: :ok
  def start_body_timer do
    stop_body_timer()
    Process.put(__MODULE__, Process.send_after(self(), :timeout, @body_timeout))
    :ok
  end

  @doc "The body is there."
  @spec stop_body_timer() :: :ok
  def stop_body_timer do
    with timer when timer != nil <- Process.delete(__MODULE__),
         false <- Process.cancel_timer(timer) do
      receive do
        :timeout -> :ok
      after
        0 -> :ok
      end
    end

    :ok
  end
end
